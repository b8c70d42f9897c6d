"""`python -m lora_studio`: the command line."""

from lora_studio.cli import main

if __name__ == "__main__":
    main()
