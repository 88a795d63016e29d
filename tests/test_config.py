"""The configuration: files, inheritance, typed values, the command line, and what each mistake says."""

import re
from pathlib import Path

import pytest

from vmamba.config import argument_parser, config_from_args, get_config, output_folder, save_config
from vmamba.config.keys import keys_of
from vmamba.errors import UserError
from vmamba.models.variants import VARIANTS, build_model, create_model

CONFIGS = Path(__file__).parents[1] / "configs"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def parse(line: str):
    return config_from_args(argument_parser().parse_args(line.split()))


def test_base_files_merge_in_order_and_the_file_itself_wins(tmp_path):
    write(tmp_path / "a.yaml", "NAME: a\nTRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 1, BASE_LR: 1}\n")
    write(tmp_path / "b.yaml", "BASE: a.yaml\nTRAIN: {WARMUP_EPOCHS: 2}\nMODEL: {OPTIONS: {d_state: 4, gate: false}}\n")
    write(tmp_path / "c.yaml", "TRAIN: {BASE_LR: 3}\n")
    (tmp_path / "sub").mkdir()
    run = write(tmp_path / "sub" / "run.yaml", "BASE: [../b.yaml, ../c.yaml]\nMODEL: {OPTIONS: {d_state: 8}}\n")
    config = get_config(run, ["TRAIN.EPOCHS", "9"])
    assert (config.TRAIN.EPOCHS, config.TRAIN.WARMUP_EPOCHS, config.TRAIN.BASE_LR) == (9, 2, 3.0)
    assert config.MODEL.OPTIONS == {"d_state": 8, "gate": False}
    assert config.BASE == [] and config.NAME == "run"


def test_a_cycle_of_base_files_is_an_error(tmp_path):
    write(tmp_path / "a.yaml", "BASE: b.yaml\n")
    write(tmp_path / "b.yaml", "BASE: a.yaml\n")
    with pytest.raises(UserError, match="cycle"):
        get_config(tmp_path / "a.yaml")


def test_saved_config_gives_the_same_config_and_folder_back(tmp_path):
    opts = "TAG 007 TRAIN.BASE_LR 1e-7 DATA.IMG_SIZE [32,64] AUG.AUTO_AUGMENT none AUG.CUTMIX_MINMAX (0.2,0.8)"
    opts += " MODEL.OPTIONS.out_norm none MODEL.OPTIONS.dims [96,192] MODEL.OPTIONS.ssm_ratio 1e-3 DATA.MEAN 0.5"
    config = get_config(CONFIGS / "vmamba_small.yaml", opts.split())
    save_config(config, tmp_path / "config.yaml")
    again = get_config(tmp_path / "config.yaml")
    assert again == config
    assert type(again.TAG) is str and again.AUG.AUTO_AUGMENT is None and again.MODEL.OPTIONS.out_norm == "none"
    assert output_folder(again) == output_folder(config) == Path("output/vmamba_small/007")
    with pytest.raises(UserError, match="cannot write"):
        save_config(config, tmp_path / "absent" / "config.yaml")


def test_values_take_the_type_of_their_key(tmp_path):
    file = write(tmp_path / "x.yaml", "TRAIN: {BASE_LR: 1e-3, CLIP_GRAD: 5, OPTIMIZER: {BETAS: [0, 0.9]}}\nAUG:\n")
    config = get_config(file, ["MODEL.OPTIONS.ssm_ratio", "1e-2", "AMP.ENABLE", "false"])
    assert config.TRAIN.BASE_LR == 0.001
    assert type(config.TRAIN.CLIP_GRAD) is float and type(config.TRAIN.OPTIMIZER.BETAS[0]) is float
    assert config.MODEL.OPTIONS.ssm_ratio == 0.01 and config.AMP.ENABLE is False
    with pytest.raises(AttributeError):
        config.TRAIN.BASE_LR = 1.0


@pytest.mark.parametrize(
    "text, message",
    [
        ("TRAIN: {EPOCH: 3}", "x.yaml: unknown config key 'TRAIN.EPOCH'; did you mean 'TRAIN.EPOCHS'?"),
        ("TRIAN: {EPOCHS: 3}", "unknown config key 'TRIAN'; did you mean 'TRAIN'?"),
        ("EPOCHS: 3", "did you mean 'TRAIN.EPOCHS'?"),
        ("train: {epochs: 3}", "did you mean 'TRAIN'?"),
        ("TRAIN: {EPOCHS: many}", r"x.yaml: TRAIN.EPOCHS is 'many' \(str\); expected an integer"),
        ("TRAIN: {EPOCHS: 2.5}", r"TRAIN.EPOCHS is 2.5 \(float\); expected an integer"),
        ("TRAIN: {EPOCHS: true}", r"TRAIN.EPOCHS is True \(bool\); expected an integer"),
        ("TRAIN: {EPOCHS: null}", "expected an integer"),
        ("TRAIN: {BASE_LR: fast}", "expected a number"),
        ("TRAIN: {BASE_LR: .nan}", "expected a finite number"),
        ("TRAIN: {EMA: {ENABLE: 3}}", "expected true or false"),
        ("TRAIN: 5", "TRAIN is 5; expected a section"),
        ("TAG: 12", "expected a string"),
        ("DATA: {IMG_SIZE: [224, 224, 3]}", "expected 2 values"),
        ("DATA: {IMG_SIZE: 22.5}", "an integer or a list of integers"),
        ("DATA: {CACHE_MODE: ful}", "did you mean 'full'?"),
        ("DATA: {INTERPOLATION: bicubik}", "did you mean 'bicubic'?"),
        ("DATA: {BATCH_SIZE: 0}", "at least 1"),
        ("AUG: {HFLIP: 1.5}", "between 0 and 1"),
        ("SEED: 4294967296", "between 0 and 4294967295"),
        ("TRAIN: {OPTIMIZER: {BETAS: [1.5, 2]}}", "at least 0 and below 1"),
        ("TRAIN: {LR_SCHEDULER: {DECAY_RATE: -1}}", "at least 0"),
        ("DATA: {STD: [0]}", "above 0"),
        ("TASK: painting", "x.yaml: unknown TASK 'painting'; known: classification"),
        ("LERNING_RATE: 1", "unknown config key 'LERNING_RATE'; did you mean 'TRAIN.BASE_LR'?"),
        ("TRAIN: {LR: 1}", "did you mean 'TRAIN.BASE_LR'?"),
        ("BOGUS: 1", "unknown config key 'BOGUS'; docs/config.md lists them all"),
        ("TRAIN: {EPOCHS: 010}", "TRAIN.EPOCHS is '010'"),
        ("TRAIN: {EPOCHS: 1:30}", "TRAIN.EPOCHS is '1:30'"),
        ("MODEL: {OPTIONS: {dims: {b: 1}}}", "MODEL.OPTIONS.dims is"),
        ("TAG: a\nTAG: b", "line 2: key 'TAG' stands twice"),
        ("TAG: " + 3000 * "[" + 3000 * "]", "it is nested too deeply"),
        ("SEED: " + 5000 * "9", "Exceeds the limit"),
        ("TAG: &a [*a]", "by its aliases it stands for more than 1,000,000 values"),
        (
            "IMPORT:\n- &0 [x]" + "".join(f"\n- &{n} [{','.join(10 * [f'*{n - 1}'])}]" for n in range(1, 9)),
            "by its aliases",
        ),
        ("TAG: [" + 999 * "x," + "x]", r"TAG is \['x', 'x', .{180,190} \(list\); expected a string"),
        ("TAG: [", "x.yaml, line"),
        ("just words", "expected sections"),
        ("BASE: none.yaml", "its BASE 'none.yaml' does not exist"),
        ("BASE: 5", "BASE is 5"),
    ],
)
def test_what_a_mistake_in_a_file_says(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        get_config(write(tmp_path / "x.yaml", text))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["TRAIN.EPOCHZ", "3"], "did you mean 'TRAIN.EPOCHS'?"),
        (["TRAIN", "3"], "TRAIN is a section"),
        (["TRAIN.EPOCHS"], "stands alone"),
        (["TRAIN.EPOCHS", "x"], "expected an integer"),
        (["TRAIN.EPOCHS", 5000 * "9"], "expected an integer"),
        (["AUG.SCALE", 3000 * "["], "AUG.SCALE is "),
        (["AMP.ENABLE", "maybe"], "expected true or false"),
        (["MODEL.OPTION.d_state", "3"], "did you mean 'MODEL.OPTIONS.d_state'?"),
        (["MODEL.OPTION.width", "3"], "did you mean 'MODEL.OPTIONS'?"),
        (["MODEL.D_STATE", "3"], "did you mean 'MODEL.OPTIONS.d_state'?"),
        (["depths", "3"], "did you mean 'MODEL.OPTIONS.depths'?"),
        (["MODEL.TYPE", "vssm"], "did you mean 'MODEL.NAME'?"),
        (["MODEL.COLOUR", "3"], "unknown config key 'MODEL.COLOUR'; docs/config.md lists them all"),
        (["AUG.DROP_PATH", "3"], "unknown config key 'AUG.DROP_PATH'; docs/config.md lists them all"),
        (["BASE", "x.yaml"], "config file only"),
    ],
)
def test_what_a_mistake_in_opts_says(opts, message):
    with pytest.raises(UserError, match=message):
        get_config(None, opts)


def test_a_missing_file_names_the_nearest(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"did you mean 'configs/vmamba_tiny.yaml'\?"):
        get_config("configs/vmamba_tny.yaml")
    for name in ("vmamba_tny.yaml", "elsewhere/vmamba_tiny.yaml"):  # a hidden file is never meant
        with pytest.raises(UserError, match=r"did you mean 'configs/vmamba_tiny.yaml'\?"):
            get_config(name)
    monkeypatch.chdir(tmp_path)  # the repository's configs are found from any folder
    assert get_config("configs/vmamba_tiny.yaml").NAME == "vmamba_tiny"
    with pytest.raises(UserError, match="does not exist; give an existing"):
        get_config(tmp_path / "qqqq.yaml")


def test_every_flag_sets_its_key():
    config = parse(
        "--cfg configs/vmamba_tiny.yaml --batch-size 4 --data-path 12 --zip --cache-mode full --pretrained p"
        " --drop-head --resume r --accumulation-steps 2 --use-checkpoint --disable-amp --output o --tag 5 --eval"
        " --throughput --optim sgd --model-ema --model-ema-decay 0.5 --local-rank 1 --opts TRAIN.EPOCHS 3"
        " --opts SEED 4 DATA.BATCH_SIZE 9"
    )
    assert (config.DATA.BATCH_SIZE, config.DATA.DATA_PATH, config.DATA.ZIP_MODE) == (4, "12", True)
    assert (config.DATA.CACHE_MODE, config.MODEL.PRETRAINED, config.MODEL.RESUME) == ("full", "p", "r")
    assert (config.TRAIN.ACCUMULATION_STEPS, config.TRAIN.USE_CHECKPOINT, config.AMP.ENABLE) == (2, True, False)
    assert (config.OUTPUT, config.TAG, config.EVAL_MODE, config.THROUGHPUT_MODE) == ("o", "5", True, True)
    assert (config.TRAIN.OPTIMIZER.NAME, config.TRAIN.EMA.ENABLE, config.TRAIN.EMA.DECAY) == ("sgd", True, 0.5)
    assert (config.TRAIN.EPOCHS, config.SEED, config.MODEL.DROP_HEAD) == (3, 4, True)
    assert parse("--cfg configs/vmamba_tiny.yaml") == get_config("configs/vmamba_tiny.yaml")


def test_underscores_and_values_of_switches():
    config = parse("--cfg=configs/vmamba_small.yaml --batch_size=4 --model_ema false --disable_amp --local_rank=0")
    assert config.DATA.BATCH_SIZE == 4 and not config.TRAIN.EMA.ENABLE and not config.AMP.ENABLE
    config = parse("--cfg configs/vmamba_tiny.yaml --model_ema true --disable-amp false --use_checkpoint 1")
    assert config.TRAIN.EMA.ENABLE and config.AMP.ENABLE and config.TRAIN.USE_CHECKPOINT
    assert not parse("--cfg configs/vmamba_tiny.yaml --amp-opt-level O0").AMP.ENABLE


@pytest.mark.parametrize(
    "line, message",
    [
        ("--cfg x.yaml --bacth-size 4", "unknown flag '--bacth-size'; did you mean '--batch-size'?"),
        ("--cgf x.yaml", "did you mean '--cfg'?"),
        ("--cfg x.yaml --accum 4", "unknown flag '--accum'"),
        ("--cfg x.yaml --opts SEED 3 --evl", "did you mean '--eval'?"),
        ("--cfg x.yaml stray", "unexpected argument 'stray'"),
        ("--batch-size 4", "--cfg FILE is required"),
        ("--cfg x.yaml --bogus", "unknown flag '--bogus'; --help lists them"),
        ("--cfg x.yaml --batch-size", "--batch-size: expected one argument"),
    ],
)
def test_a_wrong_flag_ends_with_one_sentence(capsys, line, message):
    with pytest.raises(SystemExit) as end:
        argument_parser().parse_args(line.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_text_that_yaml_1_1_would_take_for_a_number_is_text(tmp_path):
    file = write(tmp_path / "x.yaml", "TAG: 010\nNAME: 1:30\nOUTPUT: 2026-11-26\nDATA: {MEAN: 0.5, STD: 1}\n")
    config = get_config(file, ["TRAIN.BASE_LR", "1e-3"])
    assert (config.TAG, config.NAME, config.OUTPUT, config.DATA.MEAN) == ("010", "1:30", "2026-11-26", [0.5])
    with pytest.raises(UserError, match="TRAIN.EPOCHS is '010'"):
        get_config(file, ["TRAIN.EPOCHS", "010"])


def test_help_tells_defaults_and_choices(capsys):
    with pytest.raises(SystemExit):
        argument_parser().parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--batch-size BATCH_SIZE images a process and micro-batch; where" in said and "(default: 128)" in said
    assert "one of no, part, full (default: part)" in said


def test_a_flag_of_the_wrong_type_names_flag_and_key():
    with pytest.raises(UserError, match="--batch-size: DATA.BATCH_SIZE is 'x'"):
        parse("--cfg configs/vmamba_tiny.yaml --batch-size x")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("vmamba_*.yaml")), ids=lambda path: path.stem)
def test_each_config_names_its_variant_and_its_command(path):
    config = get_config(path)
    assert path.stem == config.MODEL.NAME
    assert config.MODEL.OPTIONS == {}  # the architecture's numbers live in the variants
    header = re.match(r"(#.*\n)+", path.read_text()).group()
    assert f"main.py --cfg configs/{path.name}" in header and "To expect: " in header


def test_the_recipe_on_imagenet():
    """The numbers of the released runs."""
    drop_path = {"tiny": 0.2, "small": 0.3, "base": 0.6, "base_s1l20": 0.5, "base_m2": 0.3}
    for path in CONFIGS.glob("vmamba_*.yaml"):
        name = path.stem.removeprefix("vmamba_")
        if name == "digits":
            continue
        config = get_config(path)
        train, aug = config.TRAIN, config.AUG
        assert config.MODEL.DROP_PATH_RATE is None  # so that another MODEL.NAME brings its own
        own = VARIANTS[config.MODEL.NAME].options["drop_path_rate"]
        assert drop_path.get(name, drop_path[name.split("_")[0]]) == own
        assert train.EMA.ENABLE is (name != "tiny") and train.EMA.DECAY == 0.9999
        assert (train.EPOCHS, train.WARMUP_EPOCHS, train.LR_SCHEDULER.NAME) == (300, 20, "cosine")
        assert (train.BASE_LR, train.WARMUP_LR, train.MIN_LR, train.LR_REFERENCE_BATCH) == (5e-4, 5e-7, 5e-6, 512)
        assert (train.OPTIMIZER.NAME, train.WEIGHT_DECAY, train.DECAY_SSM, train.CLIP_GRAD) == (
            "adamw",
            0.05,
            True,
            5.0,
        )
        assert (aug.AUTO_AUGMENT, aug.COLOR_JITTER) == ("rand-m9-mstd0.5-inc1", 0.4)
        assert (aug.REPROB, aug.REMODE) == (0.25, "pixel")
        assert (aug.MIXUP, aug.CUTMIX, aug.MIXUP_SWITCH_PROB, aug.MIXUP_MODE) == (0.8, 1.0, 0.5, "batch")
        assert (config.DATA.BATCH_SIZE, config.DATA.INTERPOLATION, config.MODEL.LABEL_SMOOTHING) == (
            128,
            "bicubic",
            0.1,
        )


# ------------------------------------------------------------------------------------------- the original's files

ONE_STATE = "SSM_D_STATE: 1, SSM_CONV_BIAS: false, SSM_FORWARDTYPE: v05_noz, DOWNSAMPLE: v3, PATCHEMBED: v2"
LATER = f"{ONE_STATE}, SSM_DT_RANK: auto, SSM_CONV: 3, MLP_RATIO: 4.0, NORM_LAYER: ln2d"
JANUARY = "SSM_D_STATE: 16, SSM_RATIO: 2.0, SSM_FORWARDTYPE: v0, MLP_RATIO: 0.0, DOWNSAMPLE: v1, PATCHEMBED: v1"
MAMBA2 = f"{LATER.replace('1, SSM_CONV_B', '64, SSM_CONV_B').replace('v05', 'm0')}, SSM_INIT: v2, SSM_ACT_LAYER: gelu"


def released(path, vssm, more=""):
    return write(path, f"MODEL: {{TYPE: vssm, NAME: its_name, DROP_PATH_RATE: 0.6, VSSM: {{{vssm}}}}}\n{more}\n")


@pytest.mark.parametrize(
    ("vssm", "name"),
    [
        (f"EMBED_DIM: 96, DEPTHS: [2, 2, 9, 2], {JANUARY}", "vmamba_tiny"),
        (f"EMBED_DIM: 128, DEPTHS: [2, 2, 27, 2], {JANUARY}", "vmamba_base"),
        (f"EMBED_DIM: 96, DEPTHS: [2, 2, 5, 2], SSM_RATIO: 2.0, {LATER}", "vmamba_tiny_s2l5"),
        (f"EMBED_DIM: 128, DEPTHS: [2, 2, 15, 2], SSM_RATIO: 2.0, {LATER}", "vmamba_base_s2l15"),
        (f"EMBED_DIM: 96, DEPTHS: [2, 2, 8, 2], SSM_RATIO: 1.0, {LATER}", "vmamba_tiny_s1l8"),
        (f"EMBED_DIM: 128, DEPTHS: [2, 2, 20, 2], SSM_RATIO: 1.0, {LATER}", "vmamba_base_s1l20"),
        (f"EMBED_DIM: 96, DEPTHS: [2, 2, 4, 2], SSM_RATIO: 1.0, {MAMBA2}", "vmamba_tiny_m2"),
    ],
)
def test_a_released_file_names_our_variant(tmp_path, caplog, vssm, name):
    caplog.set_level("INFO", logger="vmamba")
    config = get_config(released(tmp_path / "x.yaml", vssm, "TRAIN: {BASE_LR: 0.002}\nAMP_OPT_LEVEL: O1\nBASE: ['']"))
    in_float32 = {"scan_float32": True} if JANUARY in vssm else {}  # as its forward types scan
    assert (name, in_float32, "its_name") == (config.MODEL.NAME, config.MODEL.OPTIONS, config.NAME)
    assert (config.MODEL.DROP_PATH_RATE, config.TRAIN.BASE_LR) == (0.6, 0.002)
    assert config.TRAIN.EMA.ENABLE is (name != "vmamba_tiny")  # as the released runs
    assert f"NAME: {name}" in caplog.text and "AMP_OPT_LEVEL" in caplog.text


def test_another_architecture_is_a_variant_and_options(tmp_path):
    write(tmp_path / "base.yaml", f"MODEL: {{TYPE: vssm, VSSM: {{{LATER}, SSM_RATIO: 1.0, EMBED_DIM: 8}}}}")
    more = "BASE: base.yaml\nDATA: {IMG_SIZE: 64, MASK_RATIO: 0.6}\nAMP_ENABLE: false"
    file = released(
        tmp_path / "x.yaml", "DEPTHS: [1, 2], GMLP: true, IN_CHANS: 1, NORM_LAYER: bn, POSEMBED: true", more
    )
    config = get_config(file)
    model = build_model(config)
    ours = dict(dims=8, depths=(1, 2), gated_mlp=True, in_chans=1, norm_layer="bn", pos_embed=True, img_size=64)
    expected = create_model("vmamba_tiny_s1l8", **ours).state_dict()
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert "gated_mlp" in config.MODEL.OPTIONS and "ssm_ratio" not in config.MODEL.OPTIONS
    assert config.MODEL.IN_CHANS == 1 and not config.AMP.ENABLE
    save_config(config, tmp_path / "ours.yaml")
    assert get_config(tmp_path / "ours.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {TYPE: swin}", "x.yaml: MODEL.TYPE is 'swin'"),
        ("MODEL: {TYPE: vssm, VSSM: {SSM_DSTATE: 1}}", "x.yaml: .*'SSM_DSTATE'; did you mean 'SSM_D_STATE'?"),
        ("MODEL: {TYPE: vssm, VSSM: {SSM_FORWARDTYPE: v052dc}}", "x.yaml: forward_type 'v052dc'"),
        ("MODEL: {TYPE: vssm, VSSM: {SSM_FORWARDTYPE: xv1a}}", "x.yaml: forward_type 'xv1a'"),
        ("MODEL: {TYPE: vssm, VSSM: {SSM_FORWARDTYPE: 3}}", "x.yaml: .*SSM_FORWARDTYPE is 3"),
        ("MODEL: {TYPE: vssm, VSSM: {DEPTHS: 3}}", "x.yaml: .*DEPTHS is 3"),
        ("MODEL: {TYPE: vssm, VSSM: 3}", "MODEL.VSSM is 3"),
        ("MODEL: {TYPE: vssm}\nTRAIN: {EPOCH: 3}", "x.yaml: unknown config key 'TRAIN.EPOCH'"),
    ],
)
def test_what_a_mistake_in_a_released_file_says(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        get_config(write(tmp_path / "x.yaml", text))


def test_the_example_of_fine_tuning_starts_from_released_weights_with_a_new_head():
    config = get_config(CONFIGS / "finetune_example.yaml")
    assert VARIANTS[config.MODEL.NAME].weights == config.MODEL.PRETRAINED
    assert config.MODEL.DROP_HEAD and config.MODEL.NUM_CLASSES != 1000 and config.DATA.IMG_SIZE != 224


def test_the_page_about_training_has_every_key():
    text = (CONFIGS.parent / "docs" / "training.md").read_text()
    assert [name for name in keys_of("classification") if f"`{name}`" not in text] == []
