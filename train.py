"""Train, evaluate and apply the systems of the five case studies.

    python train.py fit      --config configs/classification/resnet20_cifar10.yaml
    python train.py validate --ckpt_path runs/resnet20_cifar10/<time>/checkpoints/best.ckpt
    python train.py test     --ckpt_path runs/resnet20_cifar10/<time>/checkpoints/best.ckpt
    python train.py predict  --ckpt_path runs/resnet20_cifar10/<time>/checkpoints/best.ckpt --data.images FOLDER

    fit        train, validate regularly, save checkpoints
    validate   compute the metrics of the validation set
    test       compute the metrics of the test set
    predict    write predictions for a folder of images

Options are dotted: --model.backbone resnet50, --data.batch_size 128, --trainer.max_epochs 90.
The command line overrides YAML files, and these override a checkpoint. Of several --config files, later ones override
earlier ones; all override configs/trainer.yaml.

    --config FILE.yaml     an experiment; may be given several times
    --model NAME           the system, for example ImageClassifier; all systems: --model.help; its options:
                           --model.help NAME
    --data NAME            the data, for example ImageNet; all datamodules: --data.help; its options: --data.help NAME
    --resume RUN           continue a run exactly from its newest checkpoint (last: the newest run of the experiment)
    --ckpt_path FILE       fit: continue from one checkpoint; validate, test, predict: the checkpoint to use
    --print_config         print the whole configuration and stop

    python train.py fit --help     all options
"""

import os
import sys


def main() -> None:
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        # Before torch and Lightning are imported, which takes seconds.
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    from cli.parser import run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
