"""What a model knows of parts of an image: boxes by class names and by phrases."""
