export const IMAGE_FORMATS = ["raw", "qcow2"] as const;
export type ImageFormat = (typeof IMAGE_FORMATS)[number];

/** Whether the text names a format that images can have here. */
export function isImageFormat(text: string): text is ImageFormat {
  return (IMAGE_FORMATS as readonly string[]).includes(text);
}
