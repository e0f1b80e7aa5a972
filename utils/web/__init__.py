"""A page to play with a trained model: what it computes, how it draws it, how it is laid out."""
