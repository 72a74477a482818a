// Attached files: by button, paste, or dropped anywhere on the page.

import { byId, h } from "./dom.js";
import { preview } from "./turns.js";

const NAMES = { image: "pictures", audio: "sounds", video: "videos" };

/** Files wait here until the message is sent. */
export class Tray {
  /** say(text): tells the user something. */
  constructor(say) {
    this.say = say;
    this.kinds = [];
    this.media = [];
    this.reading = Promise.resolve();
    this.list = byId("tray");
    const files = byId("files");
    byId("attach").addEventListener("click", () => files.click());
    files.addEventListener("change", () => {
      this.add([...files.files]);
      files.value = "";
    });
    byId("input").addEventListener("paste", (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      this.add([...event.clipboardData.files]);
    });
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      document.body.classList.add("dropping");
    });
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) document.body.classList.remove("dropping");
    });
    document.addEventListener("drop", (event) => {
      document.body.classList.remove("dropping");
      if (!hasFiles(event)) return;
      event.preventDefault();
      this.add([...event.dataTransfer.files]);
    });
  }

  /** What the model takes: some of image, audio, video. */
  offer({ id, modalities }) {
    this.kinds = modalities.filter((kind) => kind in NAMES);
    const attach = byId("attach");
    attach.disabled = !this.kinds.length;
    byId("files").accept = this.kinds.map((kind) => `${kind}/*`).join(",");
    const lacks = Object.keys(NAMES).filter((kind) => !this.kinds.includes(kind));
    const named = (kinds) => kinds.map((kind) => NAMES[kind]).join(", ");
    attach.title = lacks.length < 3 ? `Attach ${named(this.kinds)}; or paste or drop them` : "";
    const hint = this.kinds.length ? `${id} takes no ${named(lacks)}` : `${id} reads text alone`;
    byId("attach-hint").textContent = lacks.length ? hint : "";
  }

  /** Reads files, one after the other. */
  add(files) {
    this.reading = this.reading.then(async () => {
      for (const file of files) await this.read(file);
      this.draw();
      byId("input").focus();
    });
  }

  async read(file) {
    const kind = file.type.split("/")[0];
    if (!this.kinds.includes(kind)) {
      this.say(
        kind in NAMES
          ? `This model takes no ${NAMES[kind]}: ${file.name}`
          : `${file.name} is no picture, sound or video.`,
      );
      return;
    }
    try {
      const url = await dataUrl(file);
      this.media.push({ kind, name: file.name, url, preview: URL.createObjectURL(file) });
    } catch {
      this.say(`${file.name} cannot be read.`);
    }
  }

  /** What is attached, once all of it was read. */
  async whole() {
    await this.reading;
    return this.media;
  }

  /** Attaches other media in the place of what is attached. */
  put(media) {
    this.media = media;
    this.draw();
  }

  draw() {
    const items = this.media.map((medium) => {
      const remove = () => {
        release([medium]);
        this.put(this.media.filter((other) => other !== medium));
        byId("input").focus();
      };
      const button = h(
        "button",
        { type: "button", "aria-label": `Remove ${medium.name}`, onclick: remove },
        "×",
      );
      const shown = preview(medium);
      if (medium.kind === "video") shown.controls = false; // they would hide it
      return h("li", {}, shown, button);
    });
    this.list.replaceChildren(...items);
    this.list.hidden = !items.length;
  }
}

/** Lets go of the previews of media that are shown no longer. */
export function release(media) {
  for (const medium of media) URL.revokeObjectURL(medium.preview);
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
