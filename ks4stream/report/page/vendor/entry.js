// What the page uses of Observable Plot; esbuild leaves out the rest.
export {
  areaY,
  dot,
  frame,
  gridY,
  line,
  plot,
  pointer,
  pointerX,
  rect,
  rectY,
  ruleX,
  ruleY,
  text,
  tip,
} from "@observablehq/plot";
