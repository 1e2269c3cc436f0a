"""A step as one call of native code, whose rows do not depend on each other's last bits."""
