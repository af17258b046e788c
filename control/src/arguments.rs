//! From the object `arguments` to a verb's typed arguments, with errors that name the member.
//!
//! `serde_json` alone would say "invalid type: integer `5`" and leave the reader to guess
//! where. Here each member's value is read by itself, and what goes wrong becomes QEMU's text
//! with the member's name in it.

use std::collections::btree_map;
use std::fmt::{self, Display};

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, MapAccess};
use serde_json::value::RawValue;

use crate::request::{Members, excerpt};
use crate::service::{CommandError, reason};

/// Reads the arguments of a verb. None at all is the same as an empty object.
pub(crate) fn read<T: DeserializeOwned>(arguments: Option<&RawValue>) -> Result<T, CommandError> {
    let Members(members) = match arguments {
        None => Members::default(),
        Some(raw) => serde_json::from_str(raw.get())
            .map_err(|error| CommandError::generic(reason::BAD_JSON, format!("JSON parse error, {error}")))?,
    };
    let access = Access { members: members.into_iter(), value: None };
    T::deserialize(MapAccessDeserializer::new(access)).map_err(|Refusal(error)| error)
}

/// Hands members to serde one by one.
struct Access<'a> {
    members: btree_map::IntoIter<String, &'a RawValue>,
    value: Option<(String, &'a RawValue)>,
}

impl<'de> MapAccess<'de> for Access<'de> {
    type Error = Refusal;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Refusal> {
        let Some((name, value)) = self.members.next() else {
            return Ok(None);
        };
        self.value = Some((name.clone(), value));
        seed.deserialize(name.into_deserializer()).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Refusal> {
        let Some((name, value)) = self.value.take() else {
            return Err(de::Error::custom("a value was asked for before its name"));
        };
        seed.deserialize(&mut serde_json::Deserializer::from_str(value.get()))
            .map_err(|error| Refusal::of_value(&name, &error))
    }
}

/// Carries a [`CommandError`] through serde.
#[derive(Debug)]
struct Refusal(CommandError);

impl Refusal {
    fn of_value(name: &str, error: &serde_json::Error) -> Self {
        let name = excerpt(name);
        let text = error.to_string();
        // serde_json appends the place, which counts from the start of this value alone.
        let text = text.split(" at line ").next().unwrap_or(&text);
        let desc = match text.split_once(", expected ") {
            Some((found, expected)) if found.starts_with("invalid type") => {
                format!("Invalid parameter type for '{name}', expected: {expected}")
            }
            _ => format!("Invalid value of parameter '{name}': {}", excerpt(text)),
        };
        Self(CommandError::generic(reason::BAD_ARGUMENT, desc))
    }
}

impl de::Error for Refusal {
    fn custom<T: Display>(message: T) -> Self {
        let desc = format!("Invalid parameters: {message}");
        Self(CommandError::generic(reason::BAD_ARGUMENT, desc))
    }

    fn missing_field(name: &'static str) -> Self {
        let desc = format!("Parameter '{name}' is missing");
        Self(CommandError::generic(reason::MISSING_ARGUMENT, desc))
    }

    fn unknown_field(name: &str, expected: &'static [&'static str]) -> Self {
        let mut desc = format!("Parameter '{}' is unexpected", excerpt(name));
        if !expected.is_empty() {
            desc += &format!("; there are: {}", expected.join(", "));
        }
        Self(CommandError::generic(reason::UNKNOWN_ARGUMENT, desc))
    }
}

impl Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::{PageLimit, QueryChangedBlocks, QueryDisks, SnapshotCreate};

    fn from_text<T: DeserializeOwned>(text: &str) -> Result<T, (&'static str, String)> {
        let raw = serde_json::from_str::<&RawValue>(text).unwrap();
        read(Some(raw)).map_err(|error| (error.reason, error.desc))
    }

    #[test]
    fn arguments_are_typed() {
        let read: SnapshotCreate = from_text(r#"{"disks":["a","b"],"name":"s\u0031"}"#).unwrap();
        assert_eq!(read.name, "s1");
        assert_eq!(read.disks.unwrap(), ["a", "b"]);
    }

    #[test]
    fn no_arguments_are_an_empty_object() {
        assert!(read::<QueryDisks>(None).is_ok());
        assert!(from_text::<QueryDisks>("{}").is_ok());
    }

    #[test]
    fn defaults_fill_in() {
        let read: QueryChangedBlocks = from_text(r#"{"disk":"d","since":"a","snapshot":"b"}"#).unwrap();
        assert_eq!((read.offset, read.limit), (0, PageLimit::default()));
    }

    #[test]
    fn refusals_name_the_argument() {
        let refused = |text| from_text::<SnapshotCreate>(text).unwrap_err();
        let is = |reason, desc: &str| (reason, desc.to_owned());
        assert_eq!(refused("{}"), is(reason::MISSING_ARGUMENT, "Parameter 'name' is missing"));
        assert_eq!(
            refused(r#"{"nmae":"s"}"#),
            is(
                reason::UNKNOWN_ARGUMENT,
                "Parameter 'nmae' is unexpected; there are: name, disks, on-overflow, hold-deadline, limit"
            )
        );
        assert_eq!(
            refused(r#"{"name":5}"#),
            is(reason::BAD_ARGUMENT, "Invalid parameter type for 'name', expected: a string")
        );
        assert_eq!(
            refused(r#"{"name":"s","disks":"vda"}"#),
            is(reason::BAD_ARGUMENT, "Invalid parameter type for 'disks', expected: a sequence")
        );
        assert!(refused(r#"{"name":"s","name":"t"}"#).1.contains("duplicate"));
    }

    #[test]
    fn verbs_without_arguments_refuse_any() {
        let refused = from_text::<QueryDisks>(r#"{"x":1}"#).unwrap_err();
        assert_eq!(refused.0, reason::UNKNOWN_ARGUMENT);
        assert_eq!(refused.1, "Parameter 'x' is unexpected");
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for (member, text) in [
            ("limit", "0"),
            ("limit", "65537"),
            ("limit", "1.5"),
            ("limit", "-1"),
            ("offset", "-1"),
            ("offset", "18446744073709551616"),
        ] {
            let text = format!(r#"{{"disk":"d","since":"a","snapshot":"b","{member}":{text}}}"#);
            let (code, desc) = from_text::<QueryChangedBlocks>(&text).unwrap_err();
            assert_eq!(code, reason::BAD_ARGUMENT, "{text}");
            assert!(desc.contains(member), "{desc}");
        }
    }
}
