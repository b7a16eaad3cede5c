"""Ready reward functions: copy and edit."""
