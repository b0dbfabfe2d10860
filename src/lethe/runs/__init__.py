"""Settings, workspace, one run and its folder, and measuring it again."""
