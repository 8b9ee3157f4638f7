"""What img2img may be set up to beside tiles: it is done, refused, or at least not told of."""

from __future__ import annotations

import importlib
import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib_dinotile import DinotileError
from lib_dinotile.engine import flow
from lib_dinotile.settings import Settings, Txt2Img
from tests.conftest import import_of_webuis
from tests.stand_in import webui
from tests.test_freed import OPTIONS, Job, modules, no_garbage_collector, takeover  # noqa: F401

CELL = 8


def refusal(takeover: Any, p: Job) -> str:  # noqa: F811
    with pytest.raises(DinotileError) as error:
        takeover.Takeover(p, OPTIONS)
    assert error.value.status_code == 422
    return error.value.detail


@pytest.mark.parametrize("own", [None, True, False])
@pytest.mark.parametrize("for_the_job", [None, True, False])
@pytest.mark.parametrize("for_all", [True, False])
def test_tiling_is_refused_however_it_is_switched_on(takeover, modules, own, for_the_job, for_all):  # noqa: F811
    """The request comes before a setting for the job alone, and that before the WebUI's."""
    p = Job()
    p.tiling, modules("modules.shared").opts.tiling = own, for_all
    if for_the_job is not None:
        p.override_settings["tiling"] = for_the_job
    if next(value for value in (own, for_the_job, for_all) if value is not None):
        assert refusal(takeover, p).startswith("Tiling would make every tile seamless")
    else:
        takeover.Takeover(p, OPTIONS)


@pytest.mark.parametrize("there, for_all, for_the_job, refused", [
    (True, True, None, True), (True, False, True, True), (True, True, False, False), (True, False, None, False),
    (False, True, None, False), (False, None, None, False),
])  # fmt: skip
def test_reforges_clip_skip_ramp_is_refused(takeover, modules, there, for_all, for_the_job, refused):  # noqa: F811
    """It puts conditionings of its own in place of the tiles'."""
    p, opts, name = Job(), modules("modules.shared").opts, "dynamic_clip_skip_enabled"
    opts.data_labels.update({name: None} if there else {})
    if for_all is not None:  # a config.json may have it where the WebUI does not
        setattr(opts, name, for_all)
    if for_the_job is not None:
        p.override_settings[name] = for_the_job
    if refused:
        assert refusal(takeover, p).startswith("Dynamic clip skip ramp")
    else:
        takeover.Takeover(p, OPTIONS)


@pytest.mark.parametrize("hires", [False, True])
def test_hypertile_of_the_second_pass_is_refused_where_there_is_one(takeover, modules, monkeypatch, hires):  # noqa: F811
    """What comes after it would be sampled as it was."""
    opts, p = takeover.shared.opts, Job()
    p.enable_hr = hires
    monkeypatch.setitem(opts.data_labels, "hypertile_enable_unet_secondpass", None)
    monkeypatch.setattr(opts, "hypertile_enable_unet_secondpass", True, raising=False)
    refusals = modules("lib_dinotile.webui.refusals")
    if hires:
        with pytest.raises(DinotileError, match=r"^HyperTile does not work with DINO Tile"):
            refusals.check_tiles_can_follow(p, Txt2Img(enabled=True))
    else:
        refusals.check_tiles_can_follow(p, Txt2Img(enabled=True))


@pytest.mark.parametrize("size, refused", [((64, 64), True), ((64, 0), False), ((-1, -1), False)], ids=str)
def test_a_seed_for_another_size_is_refused(takeover, size, refused):  # noqa: F811
    p = Job()
    p.seed_resize_from_w, p.seed_resize_from_h = size
    if refused:
        assert refusal(takeover, p).startswith("Resize seed")
    else:
        takeover.Takeover(p, OPTIONS)


def always_on(title: str, value: Any) -> Any:
    """The WebUI's runner of scripts, with one that is always on and has two arguments, from the second on."""
    script = types.SimpleNamespace(title=lambda: title, args_from=1, args_to=3)
    return types.SimpleNamespace(alwayson_scripts=[script], selectable_scripts=[]), [0, value, 96]


@pytest.mark.parametrize("value", [True, 1, 1.0, "True", False, 0, None], ids=repr)
@pytest.mark.parametrize(
    "title", ["Tiled Diffusion", "DemoFusion", "MultiDiffusion Integrated", "StyleAlign Integrated", "Other"]
)
def test_scripts_that_do_not_go_together_with_tiles_are_refused_whatever_says_that_they_are_on(
    takeover,  # noqa: F811
    title,
    value,
):
    p = Job()
    p.scripts, p.script_args = always_on(title, value)
    if value and title != "Other":
        assert refusal(takeover, p).endswith(": switch off one of the two")
    else:
        takeover.Takeover(p, OPTIONS)


@pytest.mark.parametrize("refiner", [None, "", "None", "none", "sdxl-refiner"])
def test_no_refiner_is_none_however_it_is_said(takeover, modules, refiner):  # noqa: F811
    """A1111's ControlNet makes itself ready for `init` only then."""
    p = Job()
    p.refiner_checkpoint = refiner
    if refiner == "sdxl-refiner":
        assert refusal(takeover, p).endswith("set Refiner to None")
        return
    txt2img = modules("lib_dinotile.webui.txt2img").Txt2ImgTakeover
    p.enable_hr = False
    for job in (takeover.Takeover(p, OPTIONS), txt2img(p, Txt2Img(enabled=True))):
        job.apply()
        assert p.refiner_checkpoint is None
        takeover.undo(p)
        assert p.refiner_checkpoint == refiner


def test_png_info_says_nothing_of_noise_that_tiles_do_not_have(takeover):  # noqa: F811
    """The WebUI lets a script's keys take the place of its own, and leaves out what is None."""
    p = Job()
    takeover.Takeover(p, OPTIONS).apply()
    assert {key: p.extra_generation_params[key] for key in ("RNG", "ENSD")} == {"RNG": None, "ENSD": None}


def test_a_folder_s_next_image_is_not_painted_by_what_others_have_kept_of_ours(takeover, modules):  # noqa: F811
    """As sd-webui-controlnet does, which wraps `sample` and asks only once what it wraps."""
    p, painted = Job(), []
    replaced = modules("lib_dinotile.webui.replaced")
    for number in range(2):
        one = takeover.Takeover(p, OPTIONS)
        one.apply()
        if getattr(p, "before_hack", None) is None:
            p.before_hack = p.sample
        p.sample = lambda: painted.append(p.before_hack.__self__)
        p.sample()
        assert painted[number] is one
        replaced.undo(p)
    assert p.sample == Job.sample.__get__(p) and not hasattr(p, "before_hack")


def test_images_that_forge_keeps_are_let_go_of(takeover, modules):  # noqa: F811
    p, replaced = Job(), modules("lib_dinotile.webui.replaced")
    for _ in range(2):  # a folder's
        p.latents_after_sampling = ["a latent of another extension's"]
        replaced.undo(p)
        assert len(p.latents_after_sampling) == 1  # not ours
        takeover.Takeover(p, OPTIONS).apply()
        p.latents_after_sampling.append("pixels")
        replaced.undo(p)
        assert p.latents_after_sampling == []


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_size_is_the_canvas_s_again_after_the_webui_has_rounded_it(takeover, modules, wrapped):  # noqa: F811
    """wrapped: another extension has already replaced the method."""
    p, called = Job(), []
    if wrapped:
        p.setup_prompts = lambda: called.append(Job.setup_prompts(p))
    before = p.setup_prompts
    takeover.Takeover(p, OPTIONS).apply()
    assert (p.width, p.height) == (160, 120)
    p.width, p.height = 192, 128
    p.setup_prompts()
    assert (p.width, p.height) == (160, 120) and p.prompts_are_set_up and len(called) == wrapped
    modules("lib_dinotile.webui.replaced").undo(p)
    assert (p.width, p.height) == (512, 512) and p.setup_prompts == before


def test_a_trial_for_the_preview_is_not_the_last_generation(takeover, modules, monkeypatch):  # noqa: F811
    names = ("lib_dinotile.webui.speed", "modules.processing", "modules.shared", "modules.scripts")
    speed, processing, shared, scripts = map(modules, names)
    seen: list[tuple[bool, Any]] = []

    def process_images(p: Any) -> None:
        seen.append((shared.cmd_opts.no_prompt_history, p.override_settings))

    def job(**given: Any) -> Any:
        return types.SimpleNamespace(close=list, **given)

    monkeypatch.setattr(processing, "StableDiffusionProcessingImg2Img", job, raising=False)
    monkeypatch.setattr(processing, "process_images", process_images, raising=False)
    monkeypatch.setattr(scripts, "ScriptRunner", list, raising=False)
    monkeypatch.setattr(shared, "total_tqdm", types.SimpleNamespace(clear=list))
    monkeypatch.setattr(shared, "state", types.SimpleNamespace(begin=lambda job: None, end=list))
    speed._seconds(None, (64, 64), 1)
    assert seen == [(True, {"save_init_img": False})] and not hasattr(shared.cmd_opts, "no_prompt_history")


def test_maps_have_their_own_texts_where_masks_are_shown_too(takeover):  # noqa: F811
    p = Job()
    setattr(p, takeover.FOUND, [(None, {"semantic": Image.new("RGB", (8, 8))})])
    processed = types.SimpleNamespace(
        images=["image", "its mask"], infotexts=["a cat"], index_of_first_image=0, extra_generation_params={}
    )
    takeover.Takeover.publish(p, processed)
    assert len(processed.images) == len(processed.infotexts) == 3
    assert processed.infotexts[2] == "a cat, DINO Tile map: semantic"


@pytest.mark.parametrize("error", [DinotileError, flow.UnfinishedError])
def test_what_the_webuis_show_in_front_of_a_line_is_our_name(error):
    assert error.__name__ == "DINO Tile"


def test_every_error_of_ours_has_that_name():
    class Other(flow.UnfinishedError):
        pass

    kinds = [DinotileError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert Other in kinds and {kind.__name__ for kind in kinds} == {"DINO Tile"}


SIDES = st.integers(1, 600)
SCALES = st.one_of(
    st.floats(1, 8).map(lambda scale: Settings(scale=scale)),
    st.integers(64, 4096).map(lambda side: Settings(target="longest side", longest=side)),
)


@given(size=st.tuples(SIDES, SIDES), corners=st.tuples(*[st.floats(0, 1)] * 4), settings=SCALES)
def test_only_masked_paints_some_latent_cells_at_least(size, corners, settings):
    """As far as the source goes; a box that has enough stays as it is."""
    import_of_webuis("cv2")
    box = []
    for side, one, other in zip(size, corners[:2], corners[2:]):
        start = min(int(min(one, other) * side), side - 1)
        box.append((start, max(start + 1, int(max(one, other) * side))))
    (left, right), (top, bottom) = box
    with webui():
        importlib.import_module("modules.processing").opt_f = CELL
        area = importlib.import_module("lib_dinotile.webui.area")
        found = area.Area._roomy((left, top, right, bottom), size, settings)
    assert 0 <= found[0] <= left < right <= found[2] <= size[0]
    assert 0 <= found[1] <= top < bottom <= found[3] <= size[1]
    canvas = flow.canvas_size((found[2] - found[0], found[3] - found[1]), settings)
    for side, start, end, whole in zip(canvas, found[:2], found[2:], size):
        assert side >= area.LEAST * CELL or end - start == whole
    before = flow.canvas_size((right - left, bottom - top), settings)
    if min(before) >= area.LEAST * CELL:
        assert found == (left, top, right, bottom)
