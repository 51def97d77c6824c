# A Nomad agent beside weave, Docker and Consul. What differs between hosts is in
# a file of its own: addresses, and whether it is a server.
data_dir             = "/var/lib/nomad"
disable_update_check = true

client {
  enabled           = true
  servers           = ["u1"]
  network_interface = "eth0"

  options = {
    "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean"
  }
}
