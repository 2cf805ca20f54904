"""The lab on virtual machines: a box made here, machines booted from it by the Vagrantfile, their acceptance test."""
