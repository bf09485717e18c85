"""Train.

python train.py                                       one run, on a GPU if there is one
python train.py data.batch_size=128 seed=7            another
python train.py -m seed=1,2,3                         three
python train.py trainer.devices=4                     on four GPUs, or in four processes on a CPU
python train.py trainer.precision=bf16-mixed          mixed precision
python train.py experiment=regression                 conf/experiment/regression.yaml: the run that CI trains
python train.py --help                                every key
"""

import labtrain

if __name__ == "__main__":
    labtrain.main(config_path="conf", config_name="config")
