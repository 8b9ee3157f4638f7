"""The extension's script: hooks only; what they do is in lib_dinotile."""

from modules import script_callbacks, scripts

from lib_dinotile.webui import accordion, api, main_thread, xyz
from lib_dinotile.webui.replaced import refuse, undo
from lib_dinotile.webui.takeover import Takeover
from lib_dinotile.webui.txt2img import is_txt2img, options_for, takeover


class Script(scripts.Script):
    def title(self):
        return accordion.TITLE

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        tab = "img2img" if is_img2img else "txt2img"
        components = accordion.build(tab)
        self.infotext_fields = accordion.infotext_fields(components, tab)
        self.paste_field_names = [key for _, key in self.infotext_fields if isinstance(key, str)]
        return list(components.values())

    def before_process(self, p, *args):
        undo(p)
        if getattr(p, "_ad_inner", False):  # ADetailer paints a part of what is finished
            return
        if self.is_txt2img != is_txt2img(p):  # another extension's own work within a job of this tab
            return
        called = accordion.called(args, options_for(p))
        try:
            settings = accordion.settings_from(args, xyz.axes(p), options_for(p))
            if settings.enabled:
                takeover(p, settings).apply(called)
        except Exception as error:  # the WebUI would log it and go on without us
            refuse(p, error, called)

    def postprocess(self, p, processed, *args):
        Takeover.publish(p, processed)
        undo(p)


script_callbacks.on_before_ui(xyz.register)
script_callbacks.on_after_component(accordion.img2img.on_component)
for captions in accordion.captions.values():
    script_callbacks.on_after_component(captions.on_component)
script_callbacks.on_app_started(api.register)
script_callbacks.on_app_started(main_thread.hand_on_errors)
script_callbacks.on_app_started(accordion.restore_types)
