// Tables that are wider than the screen scroll: by keyboard too.
document$.subscribe(() =>
  setTimeout(() => {
    for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) table.tabIndex = 0;
  })
);
