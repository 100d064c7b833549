"""Does a backbone still know images as a whole? kNN, linear and zero-shot classification on its frozen features."""
