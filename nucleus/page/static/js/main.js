// The start: a session, then the gallery or the image that the address names.

import { Editor } from "./editor.js";
import { element, Gallery } from "./gallery.js";
import { server, ServerError, useToken } from "./server.js";

/** @param {string} said */
function notify(said) {
  const notice = element("notice");
  notice.textContent = said;
  notice.hidden = !said;
}

/** The service, once it has taken the token that it may need. @returns {Promise<import("./server.js").Service>} */
async function session() {
  for (let refused = false; ; refused = true) {
    try {
      return await server.session();
    } catch (error) {
      if (!(error instanceof ServerError) || error.status !== 401) throw error;
      await askToken(refused ? error.message : "");
    }
  }
}

/** Ask for the token. @param {string} said why the one before was refused */
async function askToken(said) {
  const dialog = /** @type {HTMLDialogElement} */ (element("ask-token")), input = /** @type {HTMLInputElement} */ (element("token"));
  element("token-refused").textContent = said;
  element("token-refused").hidden = !said;
  input.value = "";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  useToken(input.value);
}

async function start() {
  const service = await session();
  element("model").textContent = `model ${service.model}`;
  const gallery = new Gallery(service, notify), editor = new Editor(service, gallery);
  element("previous").addEventListener("click", () => editor.step(-1));
  element("following").addEventListener("click", () => editor.step(1));
  if (service.images) await gallery.poll();

  const route = async () => {
    const key = /^#\/bucket\/(.+)$/.exec(location.hash)?.[1];
    if (key) {
      try {
        notify("Opening an image of the bucket …");
        const opened = await gallery.fromKey(decodeURIComponent(key));
        if (location.hash === `#/bucket/${key}`) location.replace(`#/image/${opened}`); // the way back skips it
      } catch (error) {
        notify(/** @type {Error} */ (error).message);
      }
      return;
    }
    const id = /^#\/image\/(\w+)$/.exec(location.hash)?.[1], image = gallery.images.find((each) => each.id === id);
    element("gallery").hidden = Boolean(image);
    element("editor").hidden = element("crumb").hidden = !image;
    document.title = image ? `${image.name} · nucleus` : "nucleus";
    element("image-name").textContent = image?.name.split("/").pop() ?? "";
    element("image-name").title = image?.name ?? "";
    if (!image) return;
    notify("");
    try {
      await editor.open(image.id);
    } catch (error) {
      notify(/** @type {Error} */ (error).message);
    }
  };
  addEventListener("hashchange", () => void route());
  await route();
  document.body.dataset.ready = "yes";
}

start().catch((/** @type {Error} */ error) => notify(error.message));
