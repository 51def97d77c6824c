# Two web servers in a subnet of their own, on a host whose Nomad uses Docker by
# way of weave.
job "blue" {
  constraint {
    attribute = "${meta.docker}"
    value     = "proxy"
  }

  group "blue" {
    count = 2

    restart {
      attempts = 20
      interval = "5m"
      delay    = "1s"
      mode     = "delay"
    }

    task "blue" {
      driver = "docker"

      env {
        WEAVE_CIDR = "net:10.32.9.0/24"
      }

      config {
        image   = "busybox:1"
        command = "httpd"
        args    = ["-f", "-p", "8080", "-h", "/local"]
      }

      template {
        data        = "blue"
        destination = "local/index.html"
      }

      service {
        name         = "blue"
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
