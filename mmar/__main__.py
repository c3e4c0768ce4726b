"""`python -m mmar`, which `torchrun -m mmar` and `accelerate launch -m mmar` run."""

from mmar_cli import main


if __name__ == "__main__":
    main()
