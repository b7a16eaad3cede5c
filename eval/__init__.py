"""Ready evaluation suites: copy and edit."""
