// Boxes that scroll sideways can be reached by keyboard.
document$.subscribe(() => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code, p:has(> img[src$='.svg'])")) box.tabIndex = 0
})
