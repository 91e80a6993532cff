// Shows the data-tip of what is under the pointer, or under a finger.
addEventListener("DOMContentLoaded", () => {
  const tip = document.body.appendChild(Object.assign(document.createElement("div"), { id: "tip" }));
  const show = event => {
    const text = event.target.dataset && event.target.dataset.tip;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const right = innerWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(4, Math.min(event.clientX + 12, right)) + "px";
    tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 10) + "px";
  };
  tip.hidden = true;
  addEventListener("pointermove", show);
  addEventListener("pointerdown", show);
});
