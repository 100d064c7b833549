// A mark tells its numbers where a pointer, a finger or the keyboard is. Without this script its <title> does.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  for (const title of document.querySelectorAll(".mark > title")) title.remove();
  const markOf = (event) => event.target instanceof Element && event.target.closest(".mark");
  const hide = () => { tip.hidden = true; };
  const show = (mark) => {
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const parts = mark.querySelectorAll(".dot, .spot");
    const at = (parts[parts.length - 1] || mark).getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = Math.min(Math.max(at.left + at.width / 2 - tip.offsetWidth / 2, 8), width - tip.offsetWidth - 8);
    const above = at.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${above >= 4 ? above : at.bottom + 8}px`;
  };
  const react = (event) => { const mark = markOf(event); if (mark) show(mark); else hide(); };
  for (const kind of ["pointerover", "pointerdown", "focusin"]) document.addEventListener(kind, react);
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, { passive: true, capture: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
})();
