package api

import (
	"bytes"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// Templates can loop without end, so only root may have them executed.
func TestFormatIsForRoot(t *testing.T) {
	s := New(Config{Log: slog.New(slog.DiscardHandler)})
	w := httptest.NewRecorder()
	s.Status().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/report?format=x", nil))
	if w.Code != http.StatusForbidden || !strings.Contains(w.Body.String(), "weave report --format") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// Nothing but reading is possible at the status address.
func TestStatusOnlyReads(t *testing.T) {
	h := New(Config{Log: slog.New(slog.DiscardHandler)}).Status()
	for _, path := range []string{"/stop", "/reset", "/attach", "/detach", "/expose", "/hide", "/connect", "/forget", "/peer/x", "/hello", "/ps", "/ring", "/status", "/report", "/metrics"} {
		for _, method := range []string{http.MethodPost, http.MethodDelete, http.MethodPut} {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
			if w.Code != http.StatusNotFound && w.Code != http.StatusMethodNotAllowed {
				t.Errorf("%s %s: %d", method, path, w.Code)
			}
		}
	}
}

// FuzzRequests reads what is posted to the control socket: what makes no sense
// is refused as a bad request, and of the rest each word is an address.
func FuzzRequests(f *testing.F) {
	f.Add([]byte(`{"Container":"c","Addresses":["net:10.32.1.0/24","10.32.2.9/24"]}`))
	f.Add([]byte(`{"Addresses":[""],"NoMasquerade":true}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, into := range []any{new(AttachRequest), new(ExposeRequest)} {
			err := readJSON(httptest.NewRequest(http.MethodPost, "/", bytes.NewReader(body)), into)
			var words []string
			switch r := into.(type) {
			case *AttachRequest:
				words = r.Addresses
			case *ExposeRequest:
				words = r.Addresses
			}
			if err == nil {
				reqs, e := requests(words)
				if err = e; err == nil && len(reqs) != max(1, len(words)) {
					t.Errorf("%q are %d requests", words, len(reqs))
				}
			}
			if se := (*statusError)(nil); err != nil && (!errors.As(err, &se) || se.code != http.StatusBadRequest) {
				t.Errorf("%q: %v", body, err)
			}
		}
	})
}
