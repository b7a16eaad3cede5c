"""Ready recipes: `lmrl ls` names them, `lmrl cp` copies one to edit."""
