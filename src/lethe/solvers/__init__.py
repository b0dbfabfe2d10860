"""How weights move until a model does what a method says."""
