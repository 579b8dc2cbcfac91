"""Linear products that compute the effective weight as they load the dense one."""
