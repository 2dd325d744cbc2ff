"""RBD images on real Ceph or on one machine, with a C data plane."""
