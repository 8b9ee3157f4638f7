"""The extension's script: hooks only; what they do is in lib_dinotile."""

from modules import script_callbacks, scripts

from lib_dinotile.webui import accordion, api, main_thread, xyz
from lib_dinotile.webui.takeover import Takeover, refuse, undo


class Script(scripts.Script):
    def title(self):
        return accordion.TITLE

    def show(self, is_img2img):
        return scripts.AlwaysVisible if is_img2img else False

    def ui(self, is_img2img):
        components = accordion.build()
        self.infotext_fields = accordion.infotext_fields(components)
        self.paste_field_names = [key for _, key in self.infotext_fields if isinstance(key, str)]
        return list(components.values())

    def before_process(self, p, *args):
        undo(p)
        if getattr(p, "_ad_inner", False):  # ADetailer paints a part of what is finished
            return
        try:
            settings = accordion.settings_from(args, xyz.axes(p))
            if settings.enabled:
                Takeover(p, settings).apply()
        except Exception as error:  # the WebUI would log it and go on without us
            refuse(p, error)

    def postprocess(self, p, processed, *args):
        Takeover.publish(p, processed)
        undo(p)


script_callbacks.on_before_ui(xyz.register)
script_callbacks.on_after_component(accordion.img2img.on_component)
script_callbacks.on_app_started(api.register)
script_callbacks.on_app_started(main_thread.hand_on_errors)
script_callbacks.on_app_started(accordion.restore_types)
