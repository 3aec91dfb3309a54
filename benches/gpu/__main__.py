from benches.gpu import main
from minidistil.cli import run_script

run_script(main)
