# Nomad's docker driver with Docker's API by way of weave: every job is on the
# network, in the subnet that its environment names.
plugin "docker" {
  config {
    endpoint = "unix:///var/run/weave/weave.sock"

    gc {
      image = false
    }
  }
}
