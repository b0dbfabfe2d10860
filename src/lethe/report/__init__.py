"""Pages and figures, made of records alone."""
