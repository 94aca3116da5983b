/** The form of replies; "extended" also stands for extended requests. */
export type ReplyForm = "simple" | "structured" | "extended";
