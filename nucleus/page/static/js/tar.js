// A folder as one body: an archive (ustar) of its files, which are not read into memory.

const BLOCK = 512, LONGEST_NAME = 100, LONGEST_FOLDER = 155;
const text = new TextEncoder();

/** @param {{name: string, file: File}[]} files names relative to the folder @returns {Promise<Blob>} */
export async function archive(files) {
  const parts = [], ordered = [...files].sort((a, b) => (a.name < b.name ? -1 : 1)); // the same bytes for the same folder
  for (const { name, file } of ordered) parts.push(header(name, file.size), file, new Uint8Array((BLOCK - (file.size % BLOCK)) % BLOCK));
  parts.push(new Uint8Array(2 * BLOCK));
  return new Blob(parts);
}

/** @param {string} name @param {number} size */
function header(name, size) {
  const block = new Uint8Array(BLOCK), [folder, file] = divided(name);
  const put = (/** @type {string} */ value, /** @type {number} */ at) => block.set(text.encode(value), at);
  put(file, 0);
  put("0000644\0" + "0000000\0" + "0000000\0", 100);
  put(`${size.toString(8).padStart(11, "0")}\0${"0".repeat(11)}\0`, 124);
  put("        0", 148); // blanks where the sum will be, and the type of a file
  put("ustar\0" + "00", 257);
  put(folder, 345);
  const sum = block.reduce((total, value) => total + value, 0);
  put(`${sum.toString(8).padStart(6, "0")}\0 `, 148);
  return block;
}

/** @param {string} name @returns {[string, string]} the folder and the rest, as a header has room for them */
function divided(name) {
  const length = (/** @type {string} */ part) => text.encode(part).length;
  if (length(name) <= LONGEST_NAME) return ["", name];
  for (let at = name.indexOf("/"); at > 0; at = name.indexOf("/", at + 1)) {
    if (length(name.slice(at + 1)) <= LONGEST_NAME && length(name.slice(0, at)) <= LONGEST_FOLDER) return [name.slice(0, at), name.slice(at + 1)];
  }
  throw new Error(`the path ${name} in it is too long. Use nucleus predict for it.`);
}
