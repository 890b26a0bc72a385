// The start: a session, then the gallery or the image that the address names.

import { Editor } from "./editor.js";
import { element, Gallery } from "./gallery.js";
import { server } from "./server.js";

/** @param {string} said */
function notify(said) {
  const notice = element("notice");
  notice.textContent = said;
  notice.hidden = !said;
}

async function start() {
  const service = await server.session();
  element("model").textContent = `model ${service.model}`;
  const gallery = new Gallery(service, notify), editor = new Editor(service, gallery);
  element("previous").addEventListener("click", () => editor.step(-1));
  element("following").addEventListener("click", () => editor.step(1));
  if (service.images) await gallery.poll();

  const route = async () => {
    const id = /^#\/image\/(\w+)$/.exec(location.hash)?.[1], image = gallery.images.find((each) => each.id === id);
    element("gallery").hidden = Boolean(image);
    element("editor").hidden = element("crumb").hidden = !image;
    document.title = image ? `${image.name} · nucleus` : "nucleus";
    element("image-name").textContent = image?.name ?? "";
    if (!image) return;
    try {
      await editor.open(image.id);
      notify("");
    } catch (error) {
      notify(/** @type {Error} */ (error).message);
    }
  };
  addEventListener("hashchange", () => void route());
  await route();
  document.body.dataset.ready = "yes";
}

start().catch((/** @type {Error} */ error) => notify(error.message));
