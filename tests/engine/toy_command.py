"""`python -m tests.engine.toy_command`: the train command, with the toy method known to it."""

import tests.engine.toy  # noqa: F401  (registers the method)
from locfast.train import main

if __name__ == "__main__":
    main()
