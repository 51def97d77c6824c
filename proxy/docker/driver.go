package docker

import "strconv"

// What the network plugin and the proxy agree on, and what users may put into
// networks and endpoints of the driver.
const (
	// Driver is the name of the network driver and of the address driver
	// beside it.
	Driver = "weave"

	// LabelOurs marks networks that weave made by itself and may remove.
	LabelOurs = "works.weave.managed"

	// OptionMulticast is an option of a network, and of one container's
	// endpoint on it, that says whether the container gets a route for
	// multicast (224.0.0.0/4). An empty value is true.
	OptionMulticast = "works.weave.multicast"

	// Choice is a label of a container on network "weave", or an option of
	// its endpoint, that says which addresses it gets, in the words of
	// WEAVE_CIDR.
	Choice = "weave.cidr"

	// AnySource is a label of a container, and an option of a network or of one
	// container's endpoint on it. True lets the container send from addresses
	// that are not its own. An empty value is true.
	AnySource = "weave.any-source"

	// OptionGateway is an option of an endpoint. False keeps Docker from
	// giving a container that is on this network alone a way to the outside
	// by its own bridge. An empty value is true.
	OptionGateway = "works.weave.gateway"
)

// AllowsAnySource says whether the labels of a container hold AnySource. A value
// that is neither true nor false allows nothing.
func AllowsAnySource(labels map[string]string) bool {
	v, set := labels[AnySource]
	on, err := strconv.ParseBool(v)
	return set && (v == "" || err == nil && on)
}
