//! Meta contexts: their names, and which of them a query means.
//!
//! The rules are those of proto.md, "Metadata querying", and of QEMU's `docs/interop/nbd.txt`
//! for its namespace: a query with an empty leaf name lists but never selects, a query of an
//! unknown namespace or name is ignored.

use std::borrow::Cow;

use crate::export::{Context, ExportInfo};
use crate::proto;

/// Most contexts that a connection may select.
pub(crate) const MAX_SELECTED: usize = 64;

/// Name of a context on the wire.
pub(crate) fn name_of(context: Context, info: &ExportInfo) -> Cow<'static, str> {
    match context {
        Context::Allocation => proto::CONTEXT_ALLOCATION.into(),
        Context::Bitmap(index) => {
            let name = info.bitmaps.get(index).map_or("", String::as_str);
            format!("{}{name}", proto::CONTEXT_BITMAP_PREFIX).into()
        }
    }
}

/// The context of exactly this name.
pub(crate) fn exact(query: &str, info: &ExportInfo) -> Option<Context> {
    if query == proto::CONTEXT_ALLOCATION {
        return Some(Context::Allocation);
    }
    let name = query.strip_prefix(proto::CONTEXT_BITMAP_PREFIX).filter(|name| !name.is_empty())?;
    info.bitmaps.iter().position(|bitmap| bitmap == name).map(Context::Bitmap)
}

/// What `NBD_OPT_SET_META_CONTEXT` selects.
pub(crate) fn select(queries: &[String], info: &ExportInfo) -> Vec<Context> {
    let mut found = Vec::new();
    for context in queries.iter().filter_map(|query| exact(query, info)) {
        add(&mut found, context);
    }
    found
}

/// What `NBD_OPT_LIST_META_CONTEXT` lists; without a query, everything.
pub(crate) fn list(queries: &[String], info: &ExportInfo) -> Vec<Context> {
    let bitmaps = || (0..info.bitmaps.len()).map(Context::Bitmap);
    let everything = || std::iter::once(Context::Allocation).chain(bitmaps());
    if queries.is_empty() {
        return everything().collect();
    }
    let mut found = Vec::new();
    let mut seen = [false; 3];
    for query in queries {
        // A wildcard said again finds nothing new, and should not cost what the first did.
        let mut first = |wildcard: usize| !std::mem::replace(&mut seen[wildcard], true);
        match query.as_str() {
            "" if first(0) => everything().for_each(|context| add(&mut found, context)),
            proto::NAMESPACE_BASE if first(1) => add(&mut found, Context::Allocation),
            proto::NAMESPACE_QEMU | proto::CONTEXT_BITMAP_PREFIX if first(2) => {
                bitmaps().for_each(|context| add(&mut found, context));
            }
            _ => exact(query, info).into_iter().for_each(|context| add(&mut found, context)),
        }
    }
    found
}

fn add(found: &mut Vec<Context>, context: Context) {
    if !found.contains(&context) {
        found.push(context);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> ExportInfo {
        ExportInfo { bitmaps: vec!["mon".into(), "tue".into()], ..ExportInfo::read_only("vda@wed", 1 << 20) }
    }

    fn listed(queries: &[&str]) -> Vec<String> {
        let queries: Vec<_> = queries.iter().map(|&q| q.to_owned()).collect();
        list(&queries, &info()).iter().map(|&c| name_of(c, &info()).into_owned()).collect()
    }

    #[test]
    fn wildcards_list() {
        let all = ["base:allocation", "qemu:dirty-bitmap:mon", "qemu:dirty-bitmap:tue"];
        assert_eq!(listed(&[]), all);
        assert_eq!(listed(&[""]), all);
        assert_eq!(listed(&["base:"]), all[..1]);
        assert_eq!(listed(&["qemu:"]), all[1..]);
        assert_eq!(listed(&["qemu:dirty-bitmap:", "qemu:", "base:allocation"]), [all[1], all[2], all[0]]);
        assert_eq!(listed(&["qemu:dirty-bitmap:tue"]), all[2..]);
        assert!(listed(&["x-other:thing", "base:depth", "qemu:dirty-bitmap:sun"]).is_empty());
    }

    #[test]
    fn wildcards_select_nothing_and_repetition_selects_once() {
        let queries = [
            "",
            "base:",
            "qemu:",
            "qemu:dirty-bitmap:",
            "qemu:dirty-bitmap:tue",
            "base:allocation",
            "qemu:dirty-bitmap:tue",
        ]
        .map(str::to_owned);
        assert_eq!(select(&queries, &info()), [Context::Bitmap(1), Context::Allocation]);
    }
}
