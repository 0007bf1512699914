"""Trains, evaluates and applies the systems of the five case studies.

    python train.py fit      --config configs/classification/resnet20_cifar10.yaml
    python train.py validate --ckpt_path runs/resnet20_cifar10/<time>/checkpoints/best.ckpt
    python train.py test     --ckpt_path runs/resnet20_cifar10/<time>/checkpoints/best.ckpt
    python train.py predict  --ckpt_path runs/resnet20_cifar10/<time>/checkpoints/best.ckpt --data.images FOLDER

    fit        train, validate on the way, save checkpoints
    validate   measure on the validation set
    test       measure on the test set
    predict    label the images of a folder

Options are dotted: --model.network resnet50, --data.batch_size 128, --trainer.max_epochs 90. The command line beats the
YAML files (--config, later ones beat earlier ones, all beat configs/trainer.yaml), and those beat a checkpoint.

    --config FILE.yaml     an experiment; may be given several times
    --model NAME           the system, for example ImageClassifier; its options: --model.help NAME
    --data NAME            the data, for example ImageNet; its options: --data.help NAME
    --resume RUN_FOLDER    go on with a run exactly where its newest checkpoint stands ("last": the experiment's newest)
    --ckpt_path FILE       the same from one checkpoint; for validate, test and predict, what is measured
    --print_config         print the whole configuration and stop

    python train.py fit --help     every option
"""

import os
import sys


def main() -> None:
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        # Answered before torch and Lightning are imported, which takes seconds.
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    from cli.parser import run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
