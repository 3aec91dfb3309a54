from benches.gpu import main
from minidistil.cli import run

run(main)
