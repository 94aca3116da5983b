/** What is wrong with the check of an image that has nothing to check, in qemu-img's words; it has an exit code. */
export const NO_CHECKS = "this image format does not support checks";

export const IMAGE_FORMATS = ["raw", "qcow2"] as const;
export type ImageFormat = (typeof IMAGE_FORMATS)[number];

/** Whether the text names a format that images can have here. */
export function isImageFormat(text: string): text is ImageFormat {
  return (IMAGE_FORMATS as readonly string[]).includes(text);
}
