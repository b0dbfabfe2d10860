"""How weights move in a step of the gradient solver: one file an optimizer, `build` takes parameters by name."""
