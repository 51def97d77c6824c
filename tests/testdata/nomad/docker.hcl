# Nomad's docker driver with Docker's own API: jobs come onto the network by
# network_mode.
plugin "docker" {
  config {
    gc {
      image = false
    }
  }
}
