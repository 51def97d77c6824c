package cli

import (
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"weave.local/proxy"
)

// tlsFlags are those of the docker command and of dockerd.
type tlsFlags struct {
	on    bool
	given proxy.TLSFiles
}

func (f *tlsFlags) register(c *cobra.Command) {
	fs := c.Flags()
	dir := os.Getenv("DOCKER_CERT_PATH")
	if home, err := os.UserHomeDir(); err == nil && dir == "" {
		dir = filepath.Join(home, ".docker")
	}
	fs.BoolVar(&f.on, "tls", false, "TCP addresses of the proxy speak TLS; implied by --tlsverify")
	fs.BoolVar(&f.given.Verify, "tlsverify", false, "as --tls, and clients need a certificate by --tlscacert")
	fs.StringVar(&f.given.CA, "tlscacert", filepath.Join(dir, "ca.pem"), "file of the authority that clients' certificates are by")
	fs.StringVar(&f.given.Cert, "tlscert", filepath.Join(dir, "cert.pem"), "file of the proxy's certificate")
	fs.StringVar(&f.given.Key, "tlskey", filepath.Join(dir, "key.pem"), "file of the key of the proxy's certificate")
}

// files is nil without TLS.
func (f *tlsFlags) files() *proxy.TLSFiles {
	if !f.on && !f.given.Verify {
		return nil
	}
	return &f.given
}
