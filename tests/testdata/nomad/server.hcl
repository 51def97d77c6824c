# The one server of a cluster.
server {
  enabled          = true
  bootstrap_expect = 1
}
