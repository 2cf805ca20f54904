"""A whole network of hosts on one machine, made of network namespaces, to try and to show the product on."""
