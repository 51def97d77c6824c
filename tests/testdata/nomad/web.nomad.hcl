# A web server on each host, in the network's default subnet. Consul learns the
# address on the network, and checks the server through it.
job "web" {
  type = "system"

  group "web" {
    restart {
      attempts = 20
      interval = "5m"
      delay    = "1s"
      mode     = "delay"
    }

    task "web" {
      driver = "docker"

      config {
        image        = "busybox:1"
        command      = "httpd"
        args         = ["-f", "-p", "8080", "-h", "/local"]
        network_mode = "weave"
      }

      template {
        data        = "web on {{ env \"attr.unique.hostname\" }}"
        destination = "local/index.html"
      }

      service {
        name         = "web"
        provider     = "consul"
        port         = 8080
        address_mode = "driver"

        check {
          type         = "tcp"
          port         = 8080
          address_mode = "driver"
          interval     = "1s"
          timeout      = "2s"
        }
      }

      resources {
        cpu    = 50
        memory = 32
      }
    }
  }
}
