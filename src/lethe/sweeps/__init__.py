"""Many runs: a grid or a search of settings, and one choice by a stated rule."""
