"use strict";
(() => {
  const bar = document.getElementById("filters");
  if (!bar) return;
  const episodes = [...document.querySelectorAll(".episode")];
  const turns = [...document.querySelectorAll(".turn")];
  const selects = [...bar.querySelectorAll("select")];
  const shown = document.getElementById("shown");
  const fold = document.getElementById("fold");

  for (const select of selects) {
    const key = select.dataset.filter;
    const values = new Set((key === "role" ? turns : episodes).map((element) => element.dataset[key]));
    for (const value of ["", ...values]) select.add(new Option(value.replaceAll("_", " ") || "all", value));
    select.addEventListener("change", apply);
  }

  function apply() {
    const wanted = Object.fromEntries(selects.map((select) => [select.dataset.filter, select.value]));
    const fits = (element, key) => !wanted[key] || element.dataset[key] === wanted[key];
    for (const episode of episodes) episode.hidden = !["step", "verdict", "status"].every((key) => fits(episode, key));
    for (const turn of turns) turn.hidden = !fits(turn, "role");
    shown.textContent = `${episodes.filter((episode) => !episode.hidden).length} of ${episodes.length} episodes`;
  }

  fold.addEventListener("click", () => {
    const open = fold.textContent === "open all";
    for (const episode of episodes) episode.open = open;
    fold.textContent = open ? "close all" : "open all";
  });
  if (episodes.length) episodes[0].open = true;
  apply();
})();
