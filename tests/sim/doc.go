// Package sim runs the control plane of whole clusters in one process: links,
// link state, membership and tables, over a network in memory and in the time of
// testing/synctest, so that ten minutes of a hundred peers take seconds.
package sim
