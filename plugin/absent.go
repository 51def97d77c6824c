package plugin

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"weave.local/plugin/standin"
)

// absence is the content of a plugin specification that answers for the driver
// while its socket is not there, as after a start of the host: then nobody stands
// in for it either. The engine looks for a socket first, then for
// such a file with the address of one. Without either, or when nobody answers,
// it tries again for 15 s, for one container after the other. An address that
// can't be one (sun_path of unix(7) has 108 bytes) fails at once, and its text is
// in the reason that the user gets.
const absence = "unix:///" + standin.Refusal + "\n"

// WriteAbsence writes the plugin specification that makes the engine fail at
// once, instead of wait, while nobody has bound the socket. It stays until
// RemoveAbsence.
func WriteAbsence(path string) error {
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, []byte(absence)) {
		return nil
	}
	if err := os.WriteFile(path, []byte(absence), 0o644); err != nil { //nolint:gosec // as the engine's other settings
		return fmt.Errorf("plugin specification: %w", err)
	}
	return nil
}

// RemoveAbsence removes what WriteAbsence wrote, and nothing else.
func RemoveAbsence(path string) error {
	have, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) || err == nil && !bytes.Contains(have, []byte(standin.NotRunning)) {
		return nil
	}
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil {
		return fmt.Errorf("plugin specification: %w", err)
	}
	return nil
}
