//! Files of pages, which are in the program and load nothing from elsewhere.

use axum::Router;
use axum::http::HeaderName;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::IntoResponse;
use axum::routing::get;

/// Scripts, styles and requests from this server alone, and nothing in the page's own text.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A page of one's own, beside which stand the style and the script that all pages share.
#[derive(Clone, Copy)]
pub(crate) struct Page {
    pub(crate) html: &'static str,
    pub(crate) style: &'static str,
    pub(crate) script: &'static str,
}

impl Page {
    /// Routes to its files: `/`, `/page.css`, `/page.js`, and the shared `/base.css`, `/base.js`.
    pub(crate) fn routes<S: Clone + Send + Sync + 'static>(self) -> Router<S> {
        let css = "text/css; charset=utf-8";
        let javascript = "text/javascript; charset=utf-8";
        Router::new()
            .route("/", get(async move || file("text/html; charset=utf-8", self.html)))
            .route("/page.css", get(async move || file(css, self.style)))
            .route("/page.js", get(async move || file(javascript, self.script)))
            .route("/base.css", get(async || file(css, include_str!("base.css"))))
            .route("/base.js", get(async || file(javascript, include_str!("base.js"))))
    }
}

fn file(content_type: &'static str, text: &'static str) -> impl IntoResponse {
    let headers: [(HeaderName, &'static str); 5] = [
        (CONTENT_TYPE, content_type),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        // The page is the running program's.
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, text)
}
