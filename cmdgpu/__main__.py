"""``python -m cmdgpu`` is the ``cmdgpu`` command."""

from cmdgpu.cli import main

main()
